"""The benchmarks: every claim about speed, measured beside the peers; `torchimplicit bench` and `make bench`."""
