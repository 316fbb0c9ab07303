"""What others read: checkpoints, and the forms that servers load."""
