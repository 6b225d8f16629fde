"""Export: a run as one ONNX, PT2 or TorchScript file that was compared with the model itself.

Importing this package imports nothing else, so that its ``onnx_predictor`` works without Detectron2
and torch.
"""
