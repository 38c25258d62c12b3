"""Errors as OpenAI's API has them."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# An adapter that cannot be used is no fault of the request, and asking again does not help: clients try 5xx again.
ADAPTER_STATUS = 424


class ApiError(Exception):
    """A request is answered with an error.

    Args:
        status: the status of HTTP.
        message: what was found, what is allowed and what to do.
        param: the key of the request that is at fault; None where none is.
        code: a word for programs, such as ``model_not_found``.
        retry_after: seconds after which asking again may help; None where it does not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error as an object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for a request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)
