"""What the paper draws of losses: curves over x_t and how the loss concentrates on hard windows.

Pure torch, numpy and matplotlib: arrays in, numbers and figures out. Detectron2 is not imported.
"""
