"""Image-caption pairs: sources, preprocessing, and the order in which a run sees them."""
