"""Makes ``twin`` importable for the tests here and in `on_host/`, which has its own processes."""

import os

if "XATTN_TWIN_MODULE" not in os.environ:
    collect_ignore = ["on_host"]
