"""A stand-in for ZeroGPU: its scheduler, and a process that takes itself for a Space."""
