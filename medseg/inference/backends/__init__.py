"""Ways to compute a network on the CPU: plain PyTorch, ONNX Runtime, OpenVINO; see docs/engine.md."""
