"""The engine: capture, graph, pattern, match, rule, driver, pipeline, verify, report, install and undo."""
