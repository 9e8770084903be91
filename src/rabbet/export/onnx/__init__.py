"""ONNX files: weights at their own bits on disk, integer kernels at run time."""
