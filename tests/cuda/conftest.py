"""Makes ``twin`` importable for the tests here and in `on_host/`."""
