# The server. CPU: docker build -t domino_jax .
# CUDA:       docker build -t domino_jax:cuda --build-arg EXTRAS=serve,cuda12 .    (the wheels bring CUDA; the host
#             brings the driver: docker run --gpus all ...)
FROM python:3.12-slim

ARG EXTRAS=serve
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY domino_jax domino_jax
RUN pip install --no-cache-dir ".[${EXTRAS}]"
COPY serve.py train.py bench.py ./
COPY configs configs

# Weights from the hub and compiled programs outlive the container in /cache; checkpoints of your own go to /models.
RUN useradd --create-home domino && mkdir -p /cache && chown domino /cache
USER domino
VOLUME /cache
ENV HF_HOME=/cache/huggingface
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]

# Inside a container every address is needed to be reachable from outside; set DOMINO_API_KEY, or publish the port on
# the host's loopback only (-p 127.0.0.1:8000:8000).
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0", "--compilation-cache", "/cache/xla"]
