"""Opening, writing, importing and exporting models."""
