"""The demo: simulators, a trainer and a policy that learns. Nothing outside this folder depends on it."""
