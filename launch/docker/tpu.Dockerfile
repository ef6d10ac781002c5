# docker build -f launch/docker/tpu.Dockerfile -t opensora_jax:tpu .
FROM python:3.12-slim
WORKDIR /opensora_jax
COPY . .
RUN pip install --no-cache-dir -e '.[tpu]'
CMD ["python", "-m", "opensora_jax.train", "--help"]
