"""The controller runtime of exported policies: numpy and onnxruntime only. `loop.py` is where to start reading."""
