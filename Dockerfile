# The server. CPU: docker build -t domino_jax .
# CUDA:       docker build -t domino_jax:cuda --build-arg EXTRAS=serve,cuda12 .    (the wheels bring CUDA; the host
#             brings the driver: docker run --gpus all ...)
FROM python:3.12-slim

# Compiles the kernels for few rows on the CPU that the container runs on; without it XLA does their work, slower.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=serve
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY domino_jax domino_jax
RUN pip install --no-cache-dir ".[${EXTRAS}]"
COPY serve.py train.py bench.py ./
COPY configs configs

# Weights from the hub, compiled programs and kernels outlive the container in /cache; checkpoints of your own go to /models.
RUN useradd --create-home domino && mkdir -p /cache && chown domino /cache
USER domino
VOLUME /cache
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]

# Inside a container every address is needed to be reachable from outside; set DOMINO_API_KEY, or publish the port on
# the host's loopback only (-p 127.0.0.1:8000:8000).
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0", "--compilation-cache", "/cache/xla"]
