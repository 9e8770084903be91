"""ONNX files: weights at their bits on disk, integer kernels at work."""
