"""Conformance suites and the node simulation, shipped so that others can prove their parts."""
