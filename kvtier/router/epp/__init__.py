"""The endpoint picker: tells Envoy, and gateways built on it, where to send a request.

It speaks the Endpoint Picker Protocol 1.0 of the Gateway API Inference Extension
(kubernetes-sigs/gateway-api-inference-extension, docs/proposals/004-endpoint-picker-protocol).
"""
