"""The scripted server as a program with vLLM's options: what VLLM_COMMAND names in the tests of launch/.

FAKE_VLLM, blanks between: die (before it listens), loading (answers nothing yet), refusing (no completion), first (dies at the first completion), child (has a child that ignores SIGTERM), away (its child has a session of its own), hold=FILE (answers
five chats, the others when FILE is gone).
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time

from tests import fake_server

MODES = dict(mode.partition('=')[::2] for mode in os.environ.get('FAKE_VLLM', '').split())
chats = itertools.count(1)


class Handler(fake_server._Handler):
    def do_GET(self):
        return self._send(503, '') if 'loading' in MODES else super().do_GET()

    def do_POST(self):
        if 'first' in MODES:
            print('head_dim 12 is not supported', flush=True)
            os._exit(4)
        if 'refusing' in MODES:
            self.rfile.read(int(self.headers['Content-Length']))
            return self._send(400, '{"error": {"message": "no such task"}}')
        if self.path == '/v1/completions':
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            return self._send(200, json.dumps({'choices': [{'text': body['prompt']}]}))
        if next(chats) > 5 and 'hold' in MODES:
            while os.path.exists(MODES['hold']):
                time.sleep(0.02)
        return super().do_POST()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument('--model', required=True)
    parser.add_argument('--served-model-name')
    parser.add_argument('--host', required=True)
    parser.add_argument('--port', type=int, required=True)
    given, others = parser.parse_known_args()
    print('options:', *others, flush=True)
    if 'child' in MODES or 'away' in MODES:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(['sleep', '1000'], start_new_session='away' in MODES)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if 'die' in MODES:
        print('WARNING SomeError: harmless\nWorker: RuntimeError: a bad weight\nnanobind: leaked 2 types!', flush=True)
        sys.exit('RuntimeError: the engine could not start')
    http = fake_server._Http((given.host, given.port), Handler)
    http.fake = fake_server.FakeServer(model=given.served_model_name or given.model)
    http.serve_forever(poll_interval=0.05)


if __name__ == '__main__':
    main()
