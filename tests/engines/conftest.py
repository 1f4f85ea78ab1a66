"""Tests of serving engines run where the engine is installed, by `.ci/engine_tests`; no others are
collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_vllm*.py"]
