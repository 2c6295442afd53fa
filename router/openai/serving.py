"""From a router's parts to its HTTP server: the one place where the application, its guards and TLS meet."""

from collections.abc import Mapping

from starlette.types import ASGIApp

from pdserve.core.config import RouterConfig
from pdserve.core.security.tls import ServerTls
from pdserve.core.security.tokens import TokenTable
from pdserve.router.metered_intake import MeteredIntake
from pdserve.router.openai.app import create_app
from pdserve.router.openai.gateway import Gateway
from pdserve.router.openai.http_server import HttpServer
from pdserve.router.openai.logprobs import Decodes, TokenTexts
from pdserve.router.openai.token_guard import TokenGuard


def openai_server(
    intake: MeteredIntake,
    tokenizers: Mapping[str, Decodes],
    config: RouterConfig,
    *,
    grace_s: float,
    tls: ServerTls | None = None,
    tokens: TokenTable | None = None,
) -> HttpServer | None:
    """Not started yet; None where `config.http_port` is None. `grace_s`: for answers that run at the end."""
    if config.http_port is None:
        return None
    texts = {model: TokenTexts(tokenizer) for model, tokenizer in tokenizers.items()}
    gateway = Gateway(intake, tokenizers, texts, config.max_body_bytes, config.max_in_flight)
    app: ASGIApp = create_app(gateway)
    if tokens is not None:
        app = TokenGuard(app, tokens)
    context = None if tls is None else tls.context()
    return HttpServer(app, config.host, config.http_port, grace_s=grace_s, tls=context)
