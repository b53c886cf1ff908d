"""The yardstick: MADFormer in plain PyTorch, written for this project to compare speeds with.

`model` holds the network, `attention` its mask, `unet` the block U-Net, `sampling` the sampler with
its cache, `training` the loss and the optimizer, and `weights` converts our parameters.
"""
