"""A server of Google Cloud Storage's protocol: gcp-storage-emulator with generations, which it does not check.

    python tests/helpers/gcs_server.py start --host=127.0.0.1 --port=PORT --in-memory

Writers that share an object, as TensorStore's databases do, rely on the generation of what they read and on
writes that are refused when it is not the one that is there.
"""

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

ONE_AT_A_TIME = threading.Lock()


def generation(storage, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def conditional(handle, name_of):
    """The handler, refused where ``ifGenerationMatch`` is not the object's generation."""

    def checked(request, response, storage, *args, **kwargs):
        with ONE_AT_A_TIME:
            wanted = request.query.get("ifGenerationMatch", [None])[0]
            found = generation(storage, request.params["bucket_name"], name_of(request))
            if wanted is not None and wanted != found:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            handle(request, response, storage, *args, **kwargs)

    return checked


def downloaded(handle):
    """The handler, with the object's generation among the headers."""

    def named(request, response, storage, *args, **kwargs):
        with ONE_AT_A_TIME:
            place = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = generation(storage, *place)
            handle(request, response, storage, *args, **kwargs)

    return named


if __name__ == "__main__":
    objects.insert = conditional(objects.insert, lambda request: request.query.get("name", [""])[0])
    objects.delete = conditional(objects.delete, lambda request: request.params["object_id"])
    objects.download = downloaded(objects.download)
    from gcp_storage_emulator.__main__ import main

    main(sys.argv[1:])
