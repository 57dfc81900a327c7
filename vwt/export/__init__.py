"""A reduced model as a file for onnxruntime, OpenVINO or AOTInductor, and the runtimes that models run in."""
