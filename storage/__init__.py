"""Read and write caches: NumPy and zarr only, so that a cache can be read without torch."""
