# Fader on an NVIDIA GPU (or on the CPU, when the container gets none).
#
#   docker build -t fader .
#   docker run --gpus all -p 8000:8000 -e FADER_API_KEY=secret \
#       -e FADER_MODEL=/models/llama -v /srv/models:/models:ro \
#       -v fader-hub:/home/fader/.cache/huggingface fader
#
# FADER_MODEL is a folder under /models or a Hub id; without it the bundled demo is served. The server
# binds every address, so it refuses to start until FADER_API_KEY or FADER_TENANTS (a file) is set; admin
# routes stay off until FADER_ADMIN_KEY is. A drain may take a minute: stop with `docker stop --time 75`.

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3.12 -m venv /opt/fader
COPY . .
RUN /opt/fader/bin/pip install --no-cache-dir -c constraints.txt .

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# gcc and Python's headers: Triton builds the launchers of the GPU's kernels when they first run
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev libgomp1 python3.12 python3.12-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --shell /usr/sbin/nologin fader \
    && install -d -o fader -g fader /models /home/fader/.cache \
        /home/fader/.cache/huggingface /home/fader/.cache/fader /home/fader/.cache/triton
COPY --from=build /opt/fader /opt/fader
ENV PATH=/opt/fader/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/home/fader/.cache/huggingface \
    TRITON_CACHE_DIR=/home/fader/.cache/triton
USER fader
WORKDIR /home/fader
VOLUME ["/models", "/home/fader/.cache/huggingface", "/home/fader/.cache/triton"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('FADER_PORT', '8000') + '/health', timeout=4)"]
ENTRYPOINT ["fader"]
CMD ["serve", "--host", "0.0.0.0"]
