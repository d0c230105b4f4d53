"""A pool behind HTTP, on Ray Serve: `rayreward serve MODEL`. Needs the extra `serve`.

`application(NAME)` is the service for a Ray Serve that runs other things as well, and
`serving(NAME, ServeConfig())` a server of its own.
"""

from rayreward.serve.server import application, check_free, check_reach, serving

__all__ = ["application", "check_free", "check_reach", "serving"]
