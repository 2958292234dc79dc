"""What holds for every test: the same examples at each run, however slow the machine is."""

import importlib.util

if importlib.util.find_spec("hypothesis") is not None:  # the venv of the vLLM tests has none
    from hypothesis import HealthCheck, settings

    # See docs/decisions/0048. `make fuzz` names the profile "new".
    slow = [HealthCheck.too_slow]
    settings.register_profile(
        "same", derandomize=True, database=None, deadline=None, suppress_health_check=slow
    )
    settings.register_profile("new", deadline=None, suppress_health_check=slow, print_blob=True)
    settings.load_profile("same")
