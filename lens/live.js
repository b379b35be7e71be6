'use strict';
(() => {
  const page = window.lensPage, { el, button } = page;
  const { names } = JSON.parse(document.getElementById('data').textContent);
  const at = id => document.getElementById(id);
  const form = at('ask'), tokens = at('tokens'), turns = at('turns'), state = at('state'), body = document.querySelector('.all tbody');
  const OUTCOMES = { none: 'no edit', edit: 'your words', random: 'control: as far in a random direction', unrelated: 'control: an unrelated edit as large' };
  const GONE = 'The server has gone away: start it again.';
  let running = null, source = null, reading = null;

  const say = (text, wrong = false) => {
    state.textContent = text;
    state.classList.toggle('wrong', wrong);
  };
  const post = async (path, value, signal) => {
    const how = { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(value), signal };
    const answer = await fetch(path, how).catch(e => { throw signal?.aborted ? e : new Error(GONE); });
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({ detail: `The server answers ${answer.status}: try again.` }))).detail);
    return answer;
  };
  async function* events(answer) {
    const decoder = new TextDecoder();
    let rest = '';
    for (const reader = answer.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) throw new Error(GONE);
      const parts = (rest + decoder.decode(value, { stream: true })).split('\n\n');
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith('data: ')) continue;
        if (part === 'data: [DONE]') return;
        const event = JSON.parse(part.slice(6));
        if (event.detail) throw new Error(event.detail);
        yield event;
      }
    }
  }
  // one request at a time: a new one, or Cancel, ends the one before
  const run = async (what, work) => {
    running?.abort();
    const mine = running = new AbortController();
    at('cancel').hidden = false;
    say(what);
    try {
      await work(mine.signal);
    } catch (e) {
      if (running === mine) say(mine.signal.aborted ? 'Cancelled.' : e.message, !mine.signal.aborted);
    } finally {
      if (running === mine) {
        running = null;
        at('cancel').hidden = true;
      }
    }
  };

  const percents = pairs => pairs.map(([t, p]) => [t, Math.round(100 * p)]);
  const asRow = r => ({
    position: r.position, token: r.token, role: r.part, norm: Number(r.l2_norm.toPrecision(4)), beyond: r.beyond, flags: r.flags,
    controls: names.map(k => r.controls[k] ?? null), next: percents(r.next_tokens), logitLens: percents(r.logit_lens),
    explanations: r.explanations.map(e => ({
      ...e, ids: e.words.map(w => w.id),
      words: e.words.map(w => ({
        token: w.token, p: Math.round(100 * w.p), salience: Math.round(100 * (w.salience ?? 0)),
        others: percents(w.alternatives.filter(([t, p]) => t !== w.token && p >= 0.05).slice(0, 3)),
      })),
    })),
  });

  const drawTokens = all => {
    page.clear();
    tokens.replaceChildren();
    body.replaceChildren();
    let message, line;
    for (const t of all) {
      if (!line || t.message_index !== message) {
        message = t.message_index;
        const roles = [...new Set(all.filter(x => x.message_index === message && x.section === 'content').map(x => x.part))].filter(x => x !== 'text');
        line = el('p');
        const group = el('div', { class: 'message' }, roles.length ? el('span', { class: 'who', 'aria-hidden': 'true' }, roles.join(', ')) : null, line);
        page.dressGroup(group);
        tokens.append(group);
      }
      const inside = t.token.trimStart() ? t.token.replace(/^ +/, '') : t.token, part = t.fragment_index > 0;
      const kind = ['special', 'thinking'].includes(t.part) ? ` ${t.part}` : '';
      line.append(part || inside === t.token ? '' : t.token.slice(0, t.token.length - inside.length),
        el('span', { class: `t unread${kind}`, id: `t${t.position}`, role: 'option', 'aria-disabled': 'true', 'aria-selected': 'false' },
          part ? '\u25aa' : inside.trim() ? inside.replace(/\n/g, '\u21b5\n').replace(/\t/g, '\u21e5') : page.visible(inside) + (inside.includes('\n') ? '\n' : '')));
    }
    document.querySelector('.tools').hidden = false;
  };
  const drawRow = r => {
    const row = asRow(r), chip = at(`t${r.position}`);
    chip.classList.remove('unread');
    chip.removeAttribute('aria-disabled');
    page.add(row);
    const e = row.explanations[0], cells = [row.position, page.visible(row.token), `${e.nmse.toFixed(2)} ${page.label(e.nmse)}`];
    if (document.getElementById('by-beyond')) cells.push(row.beyond === null ? '' : row.beyond.toFixed(2));
    body.append(el('tr', { id: `r${row.position}` }, ...cells.map((c, k) => el('td', k === 1 ? { class: 'pre' } : {}, el('bdi', {}, String(c)))),
      el('td', {}, el('bdi', {}, page.said(e))), el('td')));
    if (page.chosen() === null && innerWidth > 800 && !row.flags.includes('early')) page.choose(row.position);
  };

  const turnNode = (role = 'user', content = '') => {
    const who = el('select', { 'aria-label': 'Role' }, ...['system', 'user', 'assistant'].map(x => el('option', x === role ? { selected: '' } : {}, x)));
    const area = el('textarea', { 'aria-label': 'What is said', rows: '2' });
    area.value = content;
    const node = el('div', { class: 'turn' }, who, area, button('Remove', () => node.remove()));
    return node;
  };
  const isChat = () => form.querySelector('[name=kind]:checked')?.value === 'chat';
  const asked = () => isChat()
    ? { messages: [...turns.children].map(n => ({ role: n.querySelector('select').value, content: n.querySelector('textarea').value })) }
    : { text: at('text').value };

  const read = () => {
    const samples = Number(at('samples').value) || 1, last = Number(at('last').value);
    const how = at('order').value === 'best' ? { best_of: samples } : { samples };
    const given = asked();
    return run('Waiting for its turn\u2026', async signal => {
      if (last > 0) {
        const { tokens: all } = await (await post('/tokenize', given, signal)).json();
        how.positions = all.slice(-last).map(t => t.position);
      }
      const stream = events(await post('/explain', { ...given, ...how, stream: true }, signal));
      const { value: head } = await stream.next();
      source = given;
      reading = { format: 'lens-reading/1', about: head.about, text: head.tokens.map(t => [t.token, t.part, t.message_index ?? -1]), rows: [] };
      drawTokens(head.tokens);
      say(`0 of ${head.total} tokens`);
      if (innerWidth <= 800) document.querySelector('.tools').scrollIntoView();
      for await (const r of stream) {
        reading.rows.push({ ...r, role: r.part, message_index: r.message_index ?? -1 });
        drawRow(r);
        say(`${reading.rows.length} of ${head.total} tokens`);
      }
      say(`${head.total} tokens read. Click one, or use the arrow keys.`);
    });
  };
  const goOn = () => run('The subject goes on\u2026', async signal => {
    const given = asked(), { completion } = await (await post('/completion', { ...given, completion_tokens: 32 }, signal)).json();
    const last = turns.lastElementChild;
    if (!isChat()) at('text').value += completion;
    else if (given.messages.at(-1).role === 'assistant') last.querySelector('textarea').value += completion;
    else turns.append(turnNode('assistant', completion.trim()));
    say(completion ? 'It went on. Read it, or change it and read.' : 'It ends here.');
  });

  // what an edit does, in the panel of a token
  page.live.panel = r => {
    const area = el('textarea', { id: 'say', 'aria-label': 'Other words for this token' }), out = el('div', { role: 'status' });
    const strength = el('input', { type: 'number', step: '0.25', value: '1', min: '-100', max: '100', id: 'strength' });
    area.value = page.said(r.explanations[0]).trim();
    const outcome = ([name, o]) => el('div', { class: 'outcome' }, el('strong', {}, OUTCOMES[name]), ` KL ${o.kl.toFixed(3)}`,
      page.choiceNode(percents(o.next_tokens.slice(0, 5))), el('p', {}, el('bdi', {}, o.continuation)));
    const put = node => {
      node.disabled = true;
      out.replaceChildren('Waiting for its turn\u2026');
      const value = { ...source, position: r.position, description: area.value, before: r.explanations[0].ids, strength: Number(strength.value) };
      post('/edit', value).then(x => x.json())
        .then(made => out.replaceChildren(el('p', { class: 'soft' }, `Moved by ${made.size.toFixed(2)} of its norm; it goes on:`), ...Object.entries(made.outcomes).map(outcome)))
        .catch(e => out.replaceChildren(el('p', { class: 'wrong' }, e.message)))
        .finally(() => { node.disabled = false; });
    };
    return [el('h3', {}, 'Say something else'), el('p', { class: 'soft' }, 'Change words; the difference is put back at this token.'), area,
      el('div', { class: 'buttons' }, el('label', { for: 'strength' }, 'Strength '), strength, button('Put back', put)), out];
  };
  page.live.save = () => run('Making the page\u2026', async signal => {
    const made = await (await post('/page', { reading, notes: page.notes }, signal)).blob();
    const link = el('a', { href: URL.createObjectURL(made), download: 'reading.html' });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say('The page is saved.');
  });

  form.addEventListener('submit', event => {
    event.preventDefault();
    read();
  });
  form.addEventListener('keydown', event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) event.preventDefault(), read();
  });
  for (const node of form.querySelectorAll('[name=kind]')) node.addEventListener('change', () => {
    at('as-chat').hidden = !isChat();
    at('as-text').hidden = isChat();
  });
  at('add-turn').addEventListener('click', () => turns.append(turnNode(turns.lastElementChild?.querySelector('select').value === 'user' ? 'assistant' : 'user')));
  at('cancel').addEventListener('click', () => running?.abort());
  at('on').addEventListener('click', goOn);
  turns.append(turnNode());
})();
