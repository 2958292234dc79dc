from kvtier.cluster.local import prepare_environment

# Before any test module imports ray: it reads some of its settings only then.
prepare_environment()
