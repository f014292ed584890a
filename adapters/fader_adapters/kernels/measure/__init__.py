"""Times the native kernels beside torch, bitsandbytes and the machine's own limits. Knows kernels,
no server and no files."""
