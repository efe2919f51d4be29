"""moto's S3 server, with create-if-absent atomic as S3 promises it: moto looks first and writes later, and two may both win."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_moto = DomainDispatcherApplication(create_backend_app)
_one_at_a_time = threading.Lock()


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    if environ["REQUEST_METHOD"] in ("PUT", "POST") and "HTTP_IF_NONE_MATCH" in environ:
        with _one_at_a_time:
            return _moto(environ, start_response)
    return _moto(environ, start_response)


if __name__ == "__main__":
    run_simple("127.0.0.1", 0, application, threaded=True)
