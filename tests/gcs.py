"""An emulated Google Cloud Storage on the loopback: python tests/gcs.py PORT.

The emulator from PyPI lacks two features that tensorstore's atomic commits need. These are the generation of an object
that is read, and requests conditional on a generation. Both are added here as in the documentation of the JSON API.
"""

import socket
import subprocess
import sys
import threading
from http import HTTPStatus

BUCKET = "bucket"


def conditional(handler):
    """Wrap a handler of one object: reject requests for another generation than the stored one."""

    def wrapped(request, response, storage, *rest, **options):
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        stored = storage.objects.get(request.params["bucket_name"], {}).get(name, {"generation": "0"})["generation"]
        if request.query.get("ifGenerationMatch", [stored])[0] != stored:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch", [None])[0] == stored:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = stored
            handler(request, response, storage, *rest, **options)

    return wrapped


def serve(port):
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    for _, methods in server.HANDLERS:
        for method, handler in methods.items():
            if handler in (objects.get, objects.download, objects.insert):
                methods[method] = conditional(handler)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).start()
    print("started", flush=True)
    threading.Event().wait()


def start():
    """Start the server; return its process and the environment in which gcsfs, tensorstore and ArrayRecord use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = [sys.executable, __file__, str(port)]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "started\n"
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
    return process, dict.fromkeys(names, f"http://127.0.0.1:{port}")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
