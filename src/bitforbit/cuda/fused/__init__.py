"""Linear layers straight from the tile layout: weights are decoded into the registers of a matrix instruction.

Weights are exact; sums are FP32, in an order of their own (order.py) that depends on the layer and the device alone: a
token's output has the same bits whatever other tokens are in the launch.
"""
