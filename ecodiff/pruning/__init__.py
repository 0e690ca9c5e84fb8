"""Gates, masks, plans and scores, and the physical slicing of a denoiser."""
