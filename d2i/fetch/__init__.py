"""Fetching of image bytes: from the corpus's directory or tars, from earlier downloads, or by URL.

`sources` is the entry point; `result` names the failures. `ssrf_guard` decides which URLs and IP
addresses may be requested, `resolver` looks up hosts, `transport` connects to them directly or
through a proxy, `http_client` sends one request and reads its body, and `deadlines` ends both in
time.
`downloader` tries the URLs of an image in order, under the limits of `rate_limiter` and the
opt-outs of robots.txt; `known_placeholders` recognizes images that replace missing ones.
`img2dataset_pool` runs many requests in threads, and `downloads` indexes what img2dataset has
downloaded before. Every failure is a value with a reason.
"""
