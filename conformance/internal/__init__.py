"""For maintainers: recorded runs of upstream, meshes, soak, planted faults, contracts, stubs, measures of the code."""
