"""Parts that the layers are made of."""
