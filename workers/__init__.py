"""What runs where a tile is computed. Nothing here imports ``qpool``."""
