"""Draft networks and their layers."""
