"""Draft networks, their layers, and the target's two matrices that training needs."""
