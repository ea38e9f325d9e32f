"""Plan what Inductor would launch on an H100, on a machine without one: `triton-convbn plan`."""
