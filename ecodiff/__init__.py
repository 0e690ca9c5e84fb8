"""ecodiff: make diffusion models smaller by learning which heads and neurons matter."""
