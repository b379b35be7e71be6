'use strict';
(() => {
  const pristine = document.documentElement.outerHTML;  // before anything is added, for a copy with notes
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const { strings, rows, controls } = read('data');
  const notes = read('notes');  // position -> {lit, text}
  const tokens = document.getElementById('tokens'), panel = document.getElementById('panel');
  const search = document.getElementById('search'), hits = document.getElementById('hits');
  const STEPS = [0.15, 0.3, 0.5, 0.8], BEYOND = [0.5, 0.3, 0.15, 0.05];
  const FLAGS = {
    early: 'Early: the lens was trained on later positions only.',
    norm: 'The norm is far from that of the other tokens: an attention sink, say.',
    failed: 'The response holds no explanation; its error is that of the zero vector.',
  };

  const row = r => ({
    position: r[0], token: strings[r[1]], role: r[2], norm: r[3], beyond: r[4], flags: r[5], controls: r[6],
    next: pairs(r[7]), logitLens: pairs(r[8]),
    explanations: r[9].map(([nmse, cosine, sampled, words]) => ({
      nmse, cosine, sampled: !!sampled,
      words: words.map(([t, p, salience = 0, ...others]) => ({ token: strings[t], p, salience, others: pairs(others) })),
    })),
  });
  const pairs = flat => flat.flatMap((t, k) => k % 2 ? [] : [[strings[t], flat[k + 1]]]);
  const all = rows.map(row), byPosition = new Map(all.map(r => [r.position, r]));
  const said = e => e.words.map(w => w.token).join('');
  const label = x => x < 0.3 ? 'high' : x < 0.5 ? 'medium' : 'low';
  const visible = t => t.trimStart().replace(/\n/g, '\u21b5').replace(/\t/g, '\u21e5') || (/\n/.test(t) ? '\u21b5' : '\u2423');
  const percent = p => p < 1 ? '<1%' : `${p}%`;
  const chip = p => document.getElementById(`t${p}`);
  let chosen = null;
  const live = { panel: () => [], save: null };  // of live.js: what it adds to the panel, how it saves

  // el('p', {class: 'x'}, 'text', node…): texts are texts, never markup
  const el = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
    node.append(...children.filter(c => c !== null));
    return node;
  };

  const tip = el('div', { id: 'tip', role: 'tooltip', hidden: '' });
  document.body.append(tip);
  const showTip = (node, text) => {
    tip.textContent = text;
    tip.hidden = false;
    node.setAttribute('aria-describedby', 'tip');
    const at = node.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const below = at.bottom + 6 + size.height < innerHeight;
    tip.style.top = `${below ? at.bottom + 6 : at.top - size.height - 6}px`;
    tip.style.left = `${Math.max(6, Math.min(at.left, innerWidth - size.width - 6))}px`;
  };
  const hideTip = () => { tip.hidden = true; };

  const wordNode = w => {
    const s = w.salience, strong = s >= 50 ? 3 : s >= 15 ? 2 : s >= 4 ? 1 : 0;
    const node = el('span', { class: `w s${strong}`, tabindex: '0' }, w.token.trimStart() || visible(w.token));
    const lines = [[w.token, w.p], ...w.others].sort((a, b) => b[1] - a[1]).map(([t, p]) => `${percent(p).padStart(4)}  ${visible(t)}`);
    if (s) lines.push(`without it the error ${s < 0 ? 'falls' : 'rises'} by ${Math.abs(s)}%`);
    for (const [on, off] of [['mouseenter', 'mouseleave'], ['focus', 'blur']]) {
      node.addEventListener(on, () => showTip(node, lines.join('\n')));
      node.addEventListener(off, hideTip);
    }
    return node;
  };
  const blanks = t => t.slice(0, t.length - t.trimStart().length);
  const saidNode = e => el('p', { class: 'said' }, ...e.words.flatMap((w, k) => [k ? blanks(w.token) : '', wordNode(w)]));
  const choiceNode = list => el('p', { class: 'choices' },
    ...list.flatMap(([t, p]) => [el('span', { class: 'pair' }, el('bdi', {}, visible(t)), ` ${percent(p)}`), ' ']));
  const barNode = (name, error, own) => {
    const bar = el('span', { class: own ? 'bar own' : 'bar' });
    bar.style.width = `${Math.min(error, 1.5) / 1.5 * 100}%`;
    return el('div', {}, el('span', {}, `${error.toFixed(2)}  ${name}`), bar);
  };
  const button = (text, act, attributes = {}) => {
    const node = el('button', { type: 'button', ...attributes }, text);
    node.addEventListener('click', () => act(node));
    return node;
  };

  const asText = r => [`${r.position}  ${visible(r.token)}  error ${r.explanations[0].nmse} (${label(r.explanations[0].nmse)})`,
    ...r.explanations.map(e => `  ${e.nmse}  ${said(e).trim()}`), ...(notes[r.position]?.text ? [`  note: ${notes[r.position].text}`] : [])].join('\n');
  const asJson = r => JSON.stringify({ ...r, note: notes[r.position]?.text, explanations: r.explanations.map(e => ({ text: said(e), ...e })) }, null, 1);
  const copy = async (text, node) => {
    const before = node.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = el('textarea', {}, text);
      document.body.append(area);
      area.select();
      document.execCommand('copy');
      area.remove();
    }
    node.textContent = 'copied';
    setTimeout(() => { node.textContent = before; }, 1200);
  };
  const saveCopy = () => {
    const json = JSON.stringify(notes).replace(/[<>&\u2028\u2029]/g, c => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);
    const html = '<!doctype html>\n' + pristine.replace(/(<script type="application\/json" id="notes">).*?(?=<\/script>)/s, (_, open) => open + json);
    const link = el('a', { href: URL.createObjectURL(new Blob([html], { type: 'text/html' })), download: 'reading.html' });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  const note = p => notes[p] ??= { lit: false, text: '' };
  const showNotes = () => {
    for (const r of all) {
      chip(r.position)?.classList.toggle('lit', !!(notes[r.position]?.lit || notes[r.position]?.text));
      const cell = document.querySelector(`#r${r.position} td:last-child`);
      if (cell) cell.textContent = notes[r.position]?.text ?? '';
    }
  };
  const setHash = () => {
    const parts = [`t=${chosen}`], kept = Object.entries(notes).filter(([, n]) => n.lit || n.text);
    if (kept.length) parts.push(`n=${encodeURIComponent(JSON.stringify(Object.fromEntries(kept)))}`);
    history.replaceState(null, '', `#${parts.join('&')}`);
  };

  const draw = r => {
    const e = r.explanations[0], head = el('h2', {}, el('bdi', {}, visible(r.token)));
    const lit = button('Highlight', n => {
      note(r.position).lit = !note(r.position).lit;
      n.setAttribute('aria-pressed', note(r.position).lit);
      showNotes();
      setHash();
    }, { 'aria-pressed': !!notes[r.position]?.lit });
    const area = el('textarea', { id: 'comment', 'aria-label': 'Your comment on this token', placeholder: 'Your comment: it travels in the address and in a saved copy' });
    area.value = notes[r.position]?.text ?? '';
    area.addEventListener('input', () => {
      note(r.position).text = area.value;
      showNotes();
      setHash();
    });
    const facts = [['Error', `${e.nmse.toFixed(3)}, ${label(e.nmse)}`], ['Cosine', e.cosine.toFixed(3)], ['Norm', String(r.norm)]];
    if (r.beyond !== null) facts.push(['Beyond', `${r.beyond.toFixed(3)} of what the last tokens leave open`]);
    panel.replaceChildren(
      el('div', { class: 'where' }, head, el('span', { class: 'soft' }, `${r.position}${r.role && r.role !== 'text' ? ` · ${r.role}` : ''}`)),
      saidNode(e),
      ...r.flags.map(f => el('p', { class: 'soft' }, FLAGS[f] ?? f)),
      el('dl', {}, ...facts.flatMap(([k, v]) => [el('dt', {}, k), el('dd', {}, v)])),
      el('h3', {}, 'Error, beside controls'),
      el('div', { class: 'bars' }, barNode('these words', e.nmse, true), ...controls.map((c, k) => r.controls[k] === null ? null : barNode(c, r.controls[k], false))),
      ...(r.explanations.length > 1 ? [el('h3', {}, 'Other samples'), el('ul', { class: 'samples' },
        ...r.explanations.slice(1).map(x => el('li', {}, saidNode(x), el('span', { class: 'soft' }, `error ${x.nmse.toFixed(2)}, ${label(x.nmse)}`))))] : []),
      el('h3', {}, 'The subject predicts next'), choiceNode(r.next),
      el('h3', {}, 'Logit lens of this block'), choiceNode(r.logitLens),
      ...live.panel(r),
      el('h3', {}, 'Notes'), area,
      el('div', { class: 'buttons' }, lit, button('Copy as text', n => copy(asText(r), n)), button('Copy as JSON', n => copy(asJson(r), n)),
        button('Save page with notes', () => (live.save ?? saveCopy)()), button('Close', close)),
    );
    panel.hidden = false;
    panel.scrollTop = 0;
    document.body.classList.add('open');
  };

  const choose = (p, { focus = false, scroll = false } = {}) => {
    if (!byPosition.has(p)) return;
    if (chosen !== null) {
      chip(chosen)?.setAttribute('aria-selected', 'false');
      chip(chosen)?.setAttribute('tabindex', '-1');
    }
    chosen = p;
    hideTip();
    draw(byPosition.get(p));
    const node = chip(p);
    node?.setAttribute('aria-selected', 'true');
    node?.setAttribute('tabindex', '0');
    if (focus) node?.focus({ preventScroll: true });
    if (scroll || focus) node?.scrollIntoView({ block: innerWidth <= 800 ? 'start' : 'nearest', behavior: 'instant' });
    setHash();
  };
  const close = () => {
    panel.hidden = true;
    document.body.classList.remove('open');
    chip(chosen)?.focus();
  };
  const move = by => {
    const among = all.filter(r => !tokens.classList.contains('searching') || chip(r.position)?.classList.contains('hit'));
    if (!among.length) return;
    const at = among.findIndex(r => r.position === chosen);
    const next = at < 0 ? (by > 0 ? 0 : among.length - 1) : Math.min(Math.max(at + by, 0), among.length - 1);
    choose(among[next].position, { focus: true });
  };
  // up and down: the token of the line above or below that is nearest
  const moveLine = down => {
    const from = chip(chosen)?.getBoundingClientRect();
    if (!from) return move(1);
    const away = all.map(r => [r.position, chip(r.position).getBoundingClientRect()])
      .filter(([, b]) => down ? b.top > from.top + 4 : b.top < from.top - 4)
      .map(([p, b]) => [p, Math.abs(b.top - from.top) * 8 + Math.abs(b.left - from.left)]);
    if (away.length) choose(away.reduce((a, b) => b[1] < a[1] ? b : a)[0], { focus: true });
  };

  tokens.addEventListener('click', event => {
    const node = event.target.closest('.t[id]');
    if (node) choose(Number(node.id.slice(1)), { focus: true });
  });
  tokens.addEventListener('focusin', event => {
    const node = event.target.closest('.t[id]');
    if (node && Number(node.id.slice(1)) !== chosen && event.target.matches(':focus-visible')) choose(Number(node.id.slice(1)));
  });
  document.addEventListener('keydown', event => {
    const typing = event.target.matches('input, textarea');
    if (event.key === 'Escape') return typing && search.value ? (search.value = '', find()) : close();
    if (event.target === search && event.key === 'Enter') return event.preventDefault(), move(1);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === '/') return event.preventDefault(), search.focus();
    const keys = { ArrowRight: () => move(1), ArrowLeft: () => move(-1), ArrowDown: () => moveLine(true), ArrowUp: () => moveLine(false), Home: () => move(-all.length), End: () => move(all.length) };
    if (keys[event.key] && (event.target === document.body || tokens.contains(event.target))) {
      event.preventDefault();
      keys[event.key]();
    }
  });

  const find = () => {
    const wanted = search.value.trim().toLowerCase();
    let count = 0;
    for (const r of all) {
      const hit = !!wanted && [r.token, ...r.explanations.map(said), notes[r.position]?.text ?? ''].some(t => t.toLowerCase().includes(wanted));
      chip(r.position)?.classList.toggle('hit', hit);
      count += hit;
    }
    tokens.classList.toggle('searching', !!wanted);
    hits.textContent = wanted ? `${count} of ${all.length} tokens; Enter goes through them` : '';
  };
  search.addEventListener('input', find);
  const byBeyond = document.getElementById('by-beyond');
  const colour = r => {
    const q = byBeyond?.checked ? BEYOND.filter(s => (r.beyond ?? 0) < s).length : STEPS.filter(s => r.explanations[0].nmse >= s).length;
    chip(r.position)?.classList.remove('q0', 'q1', 'q2', 'q3', 'q4');
    chip(r.position)?.classList.add(`q${q}`);
  };
  byBeyond?.addEventListener('change', () => all.forEach(colour));

  const set = (node, attributes) => { for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v); };
  const dressGroup = node => set(node, { role: 'group', 'aria-label': node.querySelector('.who')?.textContent || 'text' });
  const dressChip = node => {
    const r = byPosition.get(Number(node.id.slice(1) || NaN)), error = r?.explanations[0].nmse;
    const said = r ? { 'aria-label': `${visible(r.token)}, error ${error.toFixed(2)}, ${label(error)}` } : { 'aria-disabled': 'true' };
    set(node, { role: 'option', 'aria-selected': 'false', tabindex: r === all[0] && r ? '0' : '-1', ...said });
  };

  const fromHash = () => {
    const parts = new URLSearchParams(location.hash.slice(1));
    try {
      for (const [p, n] of Object.entries(JSON.parse(parts.get('n') ?? '{}'))) {
        if (byPosition.has(Number(p))) notes[p] = { lit: !!n.lit, text: String(n.text ?? '').slice(0, 10000) };
      }
    } catch { /* an address that somebody has cut: the notes in the file stay */ }
    showNotes();
    if (parts.has('t')) choose(Number(parts.get('t')), { scroll: true });
  };
  set(tokens, { role: 'listbox', 'aria-label': 'Tokens of the text', 'aria-orientation': 'horizontal' });
  tokens.querySelectorAll('.message').forEach(dressGroup);
  tokens.querySelectorAll('.t').forEach(dressChip);
  document.querySelector('.tools').hidden = !all.length;
  document.querySelector('.all').open = false;
  addEventListener('hashchange', fromHash);
  addEventListener('beforeprint', () => { document.querySelector('.all').open = true; });
  fromHash();
  const clear = () => {
    panel.hidden = true;
    document.body.classList.remove('open');
    all.length = 0;
    byPosition.clear();
    for (const p of Object.keys(notes)) delete notes[p];
    chosen = null;
  };
  const add = r => {
    all.splice(all.findLastIndex(x => x.position < r.position) + 1, 0, r);
    byPosition.set(r.position, r);
    dressChip(chip(r.position));
    colour(r);
    if (search.value) find();
  };
  window.lensPage = { live, el, button, choiceNode, visible, said, label, percent, notes, all, clear, add, dressGroup, choose, chosen: () => chosen };
  if (chosen === null && all.length && innerWidth > 800) choose(all[Math.min(all.length - 1, Math.floor(all.length / 2))].position);
})();
