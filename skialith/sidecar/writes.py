"""The routes by which agents write and go on: resume, events, checkpoint, state."""

from __future__ import annotations

from fastapi import APIRouter

from . import requests

router = APIRouter(route_class=requests.Route)
