"""The parts of the GPU check, which `perf/gpu_check.py` starts."""
