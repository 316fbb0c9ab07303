"""A run on a Ray cluster: producers and trainers are placed, watched and restarted. Only this package imports Ray."""
