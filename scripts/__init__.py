"""The command line, the quickstart and the benchmarks."""
