POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",  # icons inside the admin's and the API documentation's style sheets
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)


def content_security_policy(get_response):
    def middleware(request):
        response = get_response(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        return response

    return middleware
