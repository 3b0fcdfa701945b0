"""Preloaded by the server of the tests' child processes: they have no network either."""

import offline

offline.block()
