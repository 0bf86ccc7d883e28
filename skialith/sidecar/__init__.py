"""The HTTP sidecar: the one engine behind an API that any language speaks."""
