"""What makes an AVX-512 processor run what an AVX2 one would: torch's kernels, and oneDNN's. Ours: FASTROUTE_ISA."""

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
